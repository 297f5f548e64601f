"""The very `RunConfig` of a local run as a job of several machines: rendered, submitted, watched, requeued."""

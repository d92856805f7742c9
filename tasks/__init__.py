"""Steps of the pipeline, with all their side effects."""

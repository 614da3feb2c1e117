"""How well a model answers: retrieval, classification, calibration, approximate indexes."""

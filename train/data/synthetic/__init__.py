"""The generated diagnostics of the field: pure functions of the settings, the seed and the sample's number."""

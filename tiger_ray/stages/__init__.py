"""The stages of a night, one file per artifact, and the order of the stages."""

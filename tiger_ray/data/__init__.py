"""What users bring, as clean columns: input files, item text, events, histories."""

"""From media files, or from nothing (procedural scenes), to training records and batches."""

"""Records to batches: torch appears only in `collate`, and no model code at all."""

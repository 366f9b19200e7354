"""The way of a record into a batch: sources, formats, validate, batch_plan, collate."""

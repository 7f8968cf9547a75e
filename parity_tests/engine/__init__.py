"""The engine of every comparison: two sides, their records, a mapping between their names, and the judge."""

"""One run, from its configuration to its record. Imports records, never a room that reads records."""

"""Raw data found, fetched, unpacked and checked; prepared data written once and read as memory maps."""

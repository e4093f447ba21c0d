"""One run is one JSON record; records become tables. No module here imports torch."""

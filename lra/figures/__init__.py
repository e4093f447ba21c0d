"""What people look at: plots, TensorBoard, and prepared data. Reads records and benchmark files."""

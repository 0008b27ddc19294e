"""A very small trained checkpoint with sample pictures: ``--model demo`` works offline."""

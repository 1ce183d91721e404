"""What its attention does."""

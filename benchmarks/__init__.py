"""Programs that measure; docs/log/ says what they found."""

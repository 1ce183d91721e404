"""Programs that measure; NOTES.md says what they found."""

"""Times decoding: the attention of one token alone, and a whole token."""

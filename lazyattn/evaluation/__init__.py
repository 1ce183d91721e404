"""Where `lazyattn.eval` was: what documents named is found here still."""

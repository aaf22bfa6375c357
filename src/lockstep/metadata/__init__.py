# Who has how many tokens. Nothing is imported here: only dp_metadata.py needs torch, the others must not wait for it.

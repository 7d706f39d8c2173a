"""Programs evaluated in Python: the definition of the language; an interpreter of lowered IR."""

"""Programs evaluated in Python: the definition of the language, and an interpreter of lowered IR."""

"""A transformer teacher in the layout of CTranslate2."""

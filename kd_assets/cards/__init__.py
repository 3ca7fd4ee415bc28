"""A recipe's card: one page that says what its caches hold, how far they are, and how they are used."""

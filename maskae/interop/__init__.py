"""Other libraries' weight names and files, and the reference cases recorded from the papers' code."""

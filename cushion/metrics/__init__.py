"""What is measured on a row: one file for each metric, which says in what columns its numbers stand. No torch here."""

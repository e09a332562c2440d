"""What was found: plain data, its JSON form, pages, plots, and the difference of two reports."""

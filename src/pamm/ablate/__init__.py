"""`pamm ablate`: the rows of a paper's table as training runs, and the table that they give."""

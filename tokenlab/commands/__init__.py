"""The commands of `tokenlab`, a file each: a function, and the row that says which flags it takes."""

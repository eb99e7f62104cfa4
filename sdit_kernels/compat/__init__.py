"""Drop-in for other libraries: one file per library, none of which is imported before it is used."""

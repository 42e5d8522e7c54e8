"""Other libraries' names and signatures on our operators."""

"""What retention deletes, one kind of rows a module, in small transactions with rests between."""

"""The package's operators, one file each: schema, reference, fake function, gradient."""

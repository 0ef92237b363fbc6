"""Methods that change what tokens are: wider ones, other kinds."""

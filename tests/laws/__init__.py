"""The law battery: ten laws, each proved for every line of the tables of mixers and recurrences."""

"""The law battery: ten laws, each proved for every line of the five tables of attention, mixing, recurrences, state spaces and positions."""

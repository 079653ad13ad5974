"""One module per published system, by the package it belongs to; the table is `weft.bench.CATALOGUE`."""

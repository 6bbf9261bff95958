"""Before anything is loaded: what a run will need (ledger) and how it will be carried out (choose). Free of torch."""

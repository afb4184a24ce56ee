"""From rows to answers: exact search and what is shown of it. Knows the store, and of models only the rows that it is handed."""

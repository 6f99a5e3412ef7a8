"""How frozen weights answer: engine, scheduler, retrieval, decisions, HTTP. Needs no torch."""

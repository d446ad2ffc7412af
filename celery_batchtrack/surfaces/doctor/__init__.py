"""`doctor`: facts are gathered first (`gathering`), then judged by functions that do nothing else (`checks_…`)."""

//! Lambda: takes a public request, runs the workflow, streams the answer.

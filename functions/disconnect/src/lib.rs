//! Lambda: cleans up after an agent connection.

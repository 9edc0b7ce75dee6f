//! Lambda: decides who may open an agent connection.

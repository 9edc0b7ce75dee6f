//! Lambda: opens an agent connection and registers its tunnels.

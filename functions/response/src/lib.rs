//! Lambda: returns an agent's task token with its reply to the waiting mailbox.

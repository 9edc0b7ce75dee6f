//! AWS adapters: registry, agent link, mailboxes, workflow. The only crate that names an AWS SDK.

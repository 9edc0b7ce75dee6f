//! What another configuration changes, without IO.
//!
//! Enters: the configuration that runs and the one that was read. Leaves: a [`Change`], which says what
//! must be done about it and is what `agentd reload` answers.

use std::collections::BTreeMap;

use proto::id::TunnelName;

use crate::config::{Config, TunnelConfig};

/// What a reload changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Change {
    /// Tunnels that are new.
    pub(crate) added: Vec<String>,
    /// Tunnels that are gone.
    pub(crate) removed: Vec<String>,
    /// Tunnels that are served in another way from now on.
    pub(crate) changed: Vec<String>,
    /// How many tunnels stay as they are.
    pub(crate) unchanged: usize,
    /// Whether the connection to the edge is replaced: its address or the token is another.
    pub(crate) reconnects: bool,
    /// Settings that are another in the file, but take effect only when the agent starts.
    pub(crate) at_restart: Vec<String>,
    /// Whether the edge is told of it: names, or what is kept for one of them.
    #[serde(skip)]
    pub(crate) is_for_the_edge: bool,
    /// Whether the edge has confirmed all of it.
    #[serde(default)]
    pub(crate) confirmed: bool,
}

impl Change {
    /// Compares `old`, which runs, with `new`.
    pub(crate) fn between(old: &Config, new: &Config) -> Self {
        let by_name = |config: &Config| -> BTreeMap<TunnelName, TunnelConfig> {
            config.tunnels.iter().map(|tunnel| (tunnel.name.clone(), tunnel.clone())).collect()
        };
        let (before, after) = (by_name(old), by_name(new));
        let mut change = Self {
            reconnects: old.edge != new.edge || old.token != new.token,
            removed: before
                .keys()
                .filter(|name| !after.contains_key(name))
                .map(ToString::to_string)
                .collect(),
            ..Self::default()
        };
        for (name, tunnel) in &after {
            match before.get(name) {
                None => change.added.push(name.to_string()),
                Some(earlier) if earlier != tunnel => {
                    change.is_for_the_edge |= earlier.delivery != tunnel.delivery;
                    change.changed.push(name.to_string());
                }
                Some(_) => change.unchanged += 1,
            }
        }
        change.is_for_the_edge |= !change.added.is_empty() || !change.removed.is_empty();
        for (setting, is_another) in [
            ("control_socket", old.control_socket != new.control_socket),
            ("status_address", old.status_address != new.status_address),
            ("inspect_address", old.inspect.address != new.inspect.address),
            ("inspect_memory", old.inspect.memory != new.inspect.memory),
            ("inspect_redact", old.inspect.redact != new.inspect.redact),
            ("log", old.log != new.log),
        ] {
            if is_another {
                change.at_restart.push(setting.to_owned());
            }
        }
        change
    }

    /// What becomes of the tunnels, in one line.
    pub(crate) fn summary(&self) -> String {
        let mut parts = Vec::new();
        for (what, names) in [("added", &self.added), ("removed", &self.removed), ("changed", &self.changed)]
        {
            if !names.is_empty() {
                parts.push(format!("{what} {}", names.join(", ")));
            }
        }
        parts.push(format!("{} unchanged", self.unchanged));
        format!("reloaded: {}", parts.join("; "))
    }

    /// All of it, for people.
    pub(crate) fn to_text(&self) -> String {
        let mut text = self.summary();
        if self.reconnects {
            text.push_str("; the connection to the edge is replaced");
        }
        if !self.confirmed {
            text.push_str("\nThe edge has not confirmed it yet; `agentd status` shows when it has.");
        }
        if !self.at_restart.is_empty() {
            text.push_str(&format!("\nOnly a restart changes {}.", self.at_restart.join(", ")));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use proto::delivery::{DeliveryPolicy, Mode};

    use crate::{config::Overrides, identity::credential::TokenSource};

    use super::*;

    fn config(tunnels: &[(&str, u16)]) -> Config {
        let overrides = Overrides {
            edge: Some("ws://127.0.0.1:1".into()),
            token: Some("secret".into()),
            ..Overrides::default()
        };
        let tunnel = |(name, port): &(&str, u16)| {
            TunnelConfig::new(name.parse().unwrap(), Some(port.to_string().parse().unwrap()))
        };
        let mut config = overrides.with_tunnel(tunnel(&tunnels[0])).unwrap();
        config.tunnels = tunnels.iter().map(tunnel).collect();
        config
    }

    #[test]
    fn every_tunnel_is_added_removed_changed_or_left_alone() {
        let old = config(&[("a", 1), ("b", 2), ("c", 3)]);
        let new = config(&[("d", 4), ("c", 3), ("b", 9)]);
        let change = Change::between(&old, &new);
        assert_eq!((&change.added[..], &change.removed[..]), (&["d".to_owned()][..], &["a".to_owned()][..]));
        assert_eq!((&change.changed[..], change.unchanged), (&["b".to_owned()][..], 1));
        assert!(change.is_for_the_edge && !change.reconnects && change.at_restart.is_empty());
        assert!(change.to_text().starts_with("reloaded: added d; removed a; changed b; 1 unchanged"));
    }

    #[test]
    fn the_order_of_tunnels_means_nothing() {
        let change = Change::between(&config(&[("a", 1), ("b", 2)]), &config(&[("b", 2), ("a", 1)]));
        assert_eq!(change, Change { unchanged: 2, ..Change::default() });
        assert!(!change.is_for_the_edge);
    }

    #[test]
    fn the_edge_is_told_what_it_shall_keep() {
        let old = config(&[("a", 1)]);
        let mut new = old.clone();
        new.tunnels[0].delivery = Some(DeliveryPolicy::new(Mode::Auto));
        let change = Change::between(&old, &new);
        assert!(change.is_for_the_edge && change.changed == ["a"] && !change.reconnects);
    }

    #[test]
    fn another_token_or_edge_replaces_the_connection_and_other_settings_wait() {
        let old = config(&[("a", 1)]);
        let mut new = old.clone();
        new.token = TokenSource::from_value("other").unwrap().read().unwrap();
        assert!(Change::between(&old, &new).reconnects);
        let mut new = old.clone();
        new.edge.url = "ws://127.0.0.1:2".parse().unwrap();
        assert!(Change::between(&old, &new).reconnects);
        let mut new = old.clone();
        new.status_address = Some("127.0.0.1:1".parse().unwrap());
        let change = Change::between(&old, &new);
        assert!(!change.reconnects && change.at_restart == ["status_address"]);
        assert!(change.to_text().ends_with("Only a restart changes status_address."));
    }
}

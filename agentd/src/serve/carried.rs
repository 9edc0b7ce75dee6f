//! What outlives a reload: state of tunnels that lives as long as what it belongs to.
//!
//! Enters: the settings that a state depends on, all of them and no others, each time that a configuration is set up.
//! Leaves: the state that is in use with these very settings, or a new one. A state is held by whoever uses it, a tunnel
//! that is served or a request in flight, and is gone with the last of them. No IO.

use std::{
    any::Any,
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use proto::id::TunnelName;

/// The states of all tunnels.
#[derive(Default)]
pub(crate) struct Carried(Mutex<BTreeMap<TunnelName, Vec<Entry>>>);

struct Entry {
    settings: Box<dyn Any + Send>,
    state: Weak<dyn Any + Send + Sync>,
}

impl Entry {
    fn is_used(&self) -> bool {
        self.state.strong_count() > 0
    }
}

/// The states of one tunnel.
#[derive(Clone, Copy)]
pub(crate) struct OfTunnel<'a> {
    carried: &'a Carried,
    tunnel: &'a TunnelName,
}

impl Carried {
    /// Those of one tunnel: no two tunnels share any.
    pub(crate) const fn of<'a>(&'a self, tunnel: &'a TunnelName) -> OfTunnel<'a> {
        OfTunnel { carried: self, tunnel }
    }

    /// Lets go of the settings of what nobody uses any more.
    pub(crate) fn tidy(&self) {
        self.entries().retain(|_, entries| {
            entries.retain(Entry::is_used);
            !entries.is_empty()
        });
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<TunnelName, Vec<Entry>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OfTunnel<'_> {
    /// The state of this kind that is in use with these settings; else what `new` makes of them.
    pub(crate) fn state<K, T>(&self, settings: K, new: impl FnOnce(&K) -> T) -> Arc<T>
    where
        K: PartialEq + Send + 'static,
        T: Send + Sync + 'static,
    {
        let state = self.try_state(settings, |settings| Ok::<_, Infallible>(new(settings)));
        state.unwrap_or_else(|never| match never {})
    }

    /// The same, where a new one may fail: nothing is kept then.
    pub(crate) fn try_state<K, T, E>(
        &self,
        settings: K,
        new: impl FnOnce(&K) -> Result<T, E>,
    ) -> Result<Arc<T>, E>
    where
        K: PartialEq + Send + 'static,
        T: Send + Sync + 'static,
    {
        if let Some(state) = self.in_use(&settings) {
            return Ok(state);
        }
        // Not under the lock: it may ask for states that it is made of.
        let state = Arc::new(new(&settings)?);
        let entry = Entry {
            settings: Box::new(settings),
            state: Arc::downgrade(&(Arc::clone(&state) as Arc<dyn Any + Send + Sync>)),
        };
        let mut entries = self.carried.entries();
        let entries = entries.entry(self.tunnel.clone()).or_default();
        entries.retain(Entry::is_used);
        entries.push(entry);
        Ok(state)
    }

    fn in_use<K: PartialEq + 'static, T: Send + Sync + 'static>(&self, settings: &K) -> Option<Arc<T>> {
        let entries = self.carried.entries();
        let is_it = |entry: &&Entry| entry.settings.downcast_ref::<K>() == Some(settings);
        let found = entries.get(self.tunnel).into_iter().flatten().filter(is_it);
        let mut states = found.filter_map(|entry| entry.state.upgrade());
        states.find_map(|state| state.downcast().ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Settings(u8);

    fn name(text: &str) -> TunnelName {
        text.parse().unwrap()
    }

    #[test]
    fn a_state_is_that_of_its_tunnel_its_kind_and_its_settings() {
        let (carried, web, shop) = (Carried::default(), name("web"), name("shop"));
        let web = carried.of(&web);
        let first = web.state(Settings(1), |_| "first".to_owned());
        assert!(Arc::ptr_eq(&first, &web.state(Settings(1), |_| "again".to_owned())));
        for (other, what) in [
            (web.state(Settings(2), |_| "new".to_owned()), "other settings"),
            (web.state(1_u8, |_| "new".to_owned()), "settings of another kind"),
            (carried.of(&shop).state(Settings(1), |_| "new".to_owned()), "another tunnel"),
        ] {
            assert_eq!(*other, "new", "{what}");
        }
        assert_eq!(*web.state(Settings(1), |_| 7), 7, "a state of another kind");
        assert_eq!(*web.state(Settings(1), |_| "again".to_owned()), "first");
    }

    #[test]
    fn a_state_is_gone_with_the_last_who_uses_it() {
        let (carried, web) = (Carried::default(), name("web"));
        let web = carried.of(&web);
        let served = web.state(Settings(1), |_| 1);
        let in_flight = Arc::clone(&served);
        drop(served);
        assert_eq!(*web.state(Settings(1), |_| 2), 1);
        drop(in_flight);
        let kept = web.state(Settings(1), |_| 3);
        let len = || carried.entries().values().flatten().count();
        assert_eq!((*kept, len()), (3, 1), "nothing is left of the one before");
        carried.tidy();
        assert_eq!((*web.state(Settings(1), |_| 4), len()), (3, 1));
        drop(kept);
        carried.tidy();
        assert!(carried.entries().is_empty());
    }

    #[test]
    fn what_cannot_be_made_is_not_kept_and_one_may_be_made_of_others() {
        let (carried, web) = (Carried::default(), name("web"));
        let web = carried.of(&web);
        assert_eq!(web.try_state(Settings(1), |_| Err::<u8, _>("no")).unwrap_err(), "no");
        let outer = web.state(Settings(1), |_| web.state(Settings(2), |_| 2_u8));
        assert!(Arc::ptr_eq(&outer, &web.state(Settings(1), |_| web.state(Settings(2), |_| 3_u8))));
    }
}

//! Password files as `htpasswd` writes them: a name, a colon and a hash on each line.

use std::{collections::BTreeMap, fmt};

use argon2::{
    Argon2, PasswordVerifier as _,
    password_hash::phc::{self, Decimal},
};
use aws_lc_rs::digest;

/// What one check of a password may cost: more is a slip in the file, and would stop everybody's.
const MOST_BCRYPT_COST: u32 = 16;
const MOST_ARGON2_KIB: Decimal = 512 * 1024;
const MOST_ARGON2_PASSES: Decimal = 64;

/// The users of a file.
#[derive(Clone, PartialEq, Eq)]
pub struct Users {
    by_name: BTreeMap<Box<str>, PasswordHash>,
    /// The hash of the file, which nobody else knows.
    mark: [u8; 32],
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Users({})", self.by_name.len())
    }
}

/// The hash of a password, of a kind that is slow on purpose.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash(Kind);

#[derive(Clone, PartialEq, Eq)]
enum Kind {
    Bcrypt(Box<str>),
    Argon2(Box<phc::PasswordHash>),
}

impl PasswordHash {
    fn parse(text: &str) -> Result<Self, &'static str> {
        const KINDS: &str =
            "its hash is neither bcrypt ($2y$, $2b$, $2a$) nor argon2: make it with htpasswd -B";
        if let Some(rest) = ["$2y$", "$2b$", "$2a$"].iter().find_map(|prefix| text.strip_prefix(prefix)) {
            let cost = rest.split('$').next().and_then(|cost| cost.parse::<u32>().ok());
            let whole = text.len() == 60
                && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"./$".contains(&b))
                && cost.is_some_and(|cost| cost >= 4);
            if !whole {
                return Err("its bcrypt hash is not whole");
            }
            if cost.is_some_and(|cost| cost > MOST_BCRYPT_COST) {
                return Err("the cost of its bcrypt hash is over 16");
            }
            return Ok(Self(Kind::Bcrypt(text.into())));
        }
        if !text.starts_with("$argon2") {
            return Err(KINDS);
        }
        let hash = phc::PasswordHash::new(text).map_err(|_| "its argon2 hash is not whole")?;
        let is_over = |name, most| hash.params.get_decimal(name).is_some_and(|value| value > most);
        if is_over("m", MOST_ARGON2_KIB) || is_over("t", MOST_ARGON2_PASSES) {
            return Err("the cost of its argon2 hash is over m=524288 or t=64");
        }
        if hash.hash.is_none() || hash.salt.is_none() {
            return Err("its argon2 hash is not whole");
        }
        Ok(Self(Kind::Argon2(Box::new(hash))))
    }

    /// Whether it is the hash of this password. Takes a core for some ten milliseconds.
    pub(crate) fn is_of(&self, password: &[u8]) -> bool {
        match &self.0 {
            // As htpasswd: what is behind the 72nd byte counts for nothing.
            Kind::Bcrypt(hash) => bcrypt::verify(password, hash).unwrap_or(false),
            Kind::Argon2(hash) => Argon2::default().verify_password(password, &**hash).is_ok(),
        }
    }
}

impl Users {
    /// Reads a file's text.
    ///
    /// # Errors
    ///
    /// A sentence for the user with the line; it names no hash.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut users = BTreeMap::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim_end_matches('\r');
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |why: &str| format!("line {}: {why}", number + 1);
            let (name, hash) =
                line.split_once(':').ok_or_else(|| wrong("a name, a colon and a hash are wanted"))?;
            if name.is_empty() || name.len() > 255 || name.chars().any(char::is_control) {
                return Err(wrong("the name must have 1 to 255 bytes and no control characters"));
            }
            let hash = PasswordHash::parse(hash.trim()).map_err(wrong)?;
            if users.insert(name.into(), hash).is_some() {
                return Err(wrong("the name is there twice"));
            }
        }
        if users.is_empty() {
            return Err("it names nobody: add a user with htpasswd -B".to_owned());
        }
        let mut mark = [0; 32];
        mark.copy_from_slice(digest::digest(&digest::SHA256, text.as_bytes()).as_ref());
        Ok(Self { by_name: users, mark })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.by_name.len()
    }

    /// The hash of a user's password.
    pub(crate) fn get(&self, name: &str) -> Option<&PasswordHash> {
        self.by_name.get(name)
    }

    /// What is checked for a name that is nobody's: some user's hash, for one name always the same and for as many names as
    /// any other. So names that nobody has take as long as those of users, also where hashes cost differently.
    pub(crate) fn decoy(&self, name: &str) -> Option<&PasswordHash> {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&self.mark);
        context.update(name.as_bytes());
        let hash = context.finish();
        let (first, _) = hash.as_ref().split_first_chunk()?;
        let count = u64::try_from(self.by_name.len()).ok()?;
        let at = u64::from_be_bytes(*first).checked_rem(count)?;
        self.by_name.values().nth(usize::try_from(at).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "secret" at the lowest cost, by Apache's htpasswd (2y), Rust (2b) and an older library (2a).
    pub(crate) const TWO_Y: &str = "$2y$04$DWi7TdQmTGO1gNKxlEd7jeW8k8hyJKPvQTNt9V/Yz9gNCc4xOMRY2";

    #[test]
    fn every_kind_of_bcrypt_and_argon2_is_read_and_verified() {
        let bcrypt = bcrypt::hash("secret", 4).unwrap();
        let parts = bcrypt::hash_with_result("secret", 4).unwrap();
        let hashes = [
            bcrypt,
            parts.format_for_version(bcrypt::Version::TwoY),
            parts.format_for_version(bcrypt::Version::TwoA),
            argon2_hash("argon2id"),
            argon2_hash("argon2i"),
        ];
        let text: String =
            hashes.iter().enumerate().map(|(n, hash)| format!("user{n}:{hash}\r\n\n# a remark\n")).collect();
        let users = Users::parse(&text).unwrap();
        for (n, written) in hashes.iter().enumerate() {
            let hash = users.get(&format!("user{n}")).unwrap();
            assert!(hash.is_of(b"secret") && !hash.is_of(b"Secret") && !hash.is_of(b""), "{written}");
        }
        assert!(users.get("nobody").is_none() && users.decoy("nobody").is_some());
        assert_eq!(format!("{users:?}"), "Users(5)");
    }

    fn argon2_hash(kind: &str) -> String {
        use argon2::{Algorithm, CustomizedPasswordHasher as _, Params};
        Argon2::new(
            kind.parse::<Algorithm>().unwrap(),
            argon2::Version::V0x13,
            Params::new(8, 1, 1, None).unwrap(),
        )
        .hash_password_customized(
            b"secret",
            b"saltsaltsalt",
            Some(kind),
            None,
            Params::new(8, 1, 1, None).unwrap(),
        )
        .unwrap()
        .to_string()
    }

    #[test]
    fn names_that_nobody_has_cost_what_those_of_users_do() {
        let cheap = TWO_Y.to_owned();
        let dear = TWO_Y.replace("$04$", "$06$");
        // One of four is dear, whichever stands first in the file or the alphabet.
        for order in [["a", "b", "c", "d"], ["d", "c", "b", "a"]] {
            let [one, rest @ ..] = order;
            let text: String = std::iter::once((one, &dear))
                .chain(rest.map(|name| (name, &cheap)))
                .map(|(name, hash)| format!("{name}:{hash}\n"))
                .collect();
            let users = Users::parse(&text).unwrap();
            let is_dear = |name: &str| *users.decoy(name).unwrap() == PasswordHash::parse(&dear).unwrap();
            let names: Vec<_> = (0..400).map(|n| format!("nobody{n}")).collect();
            let count = names.iter().filter(|name| is_dear(name)).count();
            assert!((60..140).contains(&count), "{count} of 400");
            let again = Users::parse(&text).unwrap();
            for name in &names {
                assert!(
                    users.decoy(name) == again.decoy(name),
                    "{name}: by its time it is known after a restart"
                );
            }
            let other = Users::parse(&format!("{text}# another file\n")).unwrap();
            assert!(names.iter().any(|name| users.decoy(name) != other.decoy(name)), "nobody can tell which");
        }
    }

    #[test]
    fn what_cannot_be_checked_is_refused_with_its_line() {
        for (text, message) in [
            ("", "it names nobody: add a user with htpasswd -B"),
            ("\n# x\n", "it names nobody: add a user with htpasswd -B"),
            ("me", "line 1: a name, a colon and a hash are wanted"),
            (":x", "line 1: the name must have 1 to 255 bytes and no control characters"),
            (
                "\nme:secret",
                "line 2: its hash is neither bcrypt ($2y$, $2b$, $2a$) nor argon2: make it with htpasswd -B",
            ),
            (
                "me:$apr1$a$b",
                "line 1: its hash is neither bcrypt ($2y$, $2b$, $2a$) nor argon2: make it with htpasswd -B",
            ),
            ("me:$2y$04$short", "line 1: its bcrypt hash is not whole"),
            ("me:$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ", "line 1: its argon2 hash is not whole"),
            (
                "me:$argon2id$v=19$m=524289,t=1,p=1$c2FsdHNhbHQ$c2FsdHNhbHRzYWx0c2FsdA",
                "line 1: the cost of its argon2 hash is over m=524288 or t=64",
            ),
        ] {
            assert_eq!(Users::parse(text).unwrap_err(), message, "{text:?}");
        }
        let twice = format!("a:{TWO_Y}\na:{TWO_Y}");
        assert_eq!(Users::parse(&twice).unwrap_err(), "line 2: the name is there twice");
        let costly = format!("a:{}", TWO_Y.replace("$04$", "$17$"));
        assert_eq!(Users::parse(&costly).unwrap_err(), "line 1: the cost of its bcrypt hash is over 16");
    }
}

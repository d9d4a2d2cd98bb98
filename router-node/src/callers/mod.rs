//! Who calls a router node and what they may take: the one place where callers are identified, for every API.
//!
//! `keys` reads the file of `--api-keys`, `reload` follows it, `caller` counts what each caller takes, in the `bucket`s of its
//! limits. Without a file everybody may call and is told apart by address. Never logs a key or its hash.

mod bucket;
mod caller;
pub mod keys;
mod reload;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use sirocco_types::Priority;
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};
use tokio::sync::watch;

use caller::Usage;
pub(crate) use caller::{Admission, Caller, Limited, Rate};
use keys::{Entry, Limits};
pub use reload::OpenError;
pub(crate) use reload::Reload;

use crate::scheduler::ClientId;

/// Everybody who may call.
#[derive(Clone, Debug)]
pub(crate) struct Callers {
    /// None: everybody.
    known: Option<Following>,
}

/// The callers with a key, as they are now.
type Following = watch::Receiver<Arc<Vec<Known>>>;

/// A caller with a key.
#[derive(Clone, Debug)]
struct Known {
    entry: Entry,
    caller: Arc<Caller>,
}

/// A caller that is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unidentified {
    #[error("there is no API key with the request; send one as `Authorization: Bearer KEY`")]
    NoKey,
    #[error("the API key is not valid")]
    UnknownKey,
    #[error("the API key expired at {0}")]
    Expired(Timestamp),
}

impl Callers {
    /// The callers of `file`, and what follows its changes; everybody without one.
    pub(crate) fn open(file: Option<&Path>) -> Result<(Self, Option<Reload>), OpenError> {
        let Some(file) = file else { return Ok((Self { known: None }, None)) };
        let (reload, known) = Reload::open(file)?;
        Ok((Self { known: Some(known) }, Some(reload)))
    }

    /// Who sends a request with this `Authorization` from this address.
    pub(crate) fn identify(
        &self,
        authorization: Option<&[u8]>,
        peer: Option<IpAddr>,
    ) -> Result<Arc<Caller>, Unidentified> {
        match &self.known {
            None => Ok(Arc::new(anonymous(peer))),
            Some(known) => find(&known.borrow(), authorization, Timestamp::now()),
        }
    }
}

/// The caller whose key this is. Compares with every key to its end, so that how long it takes says nothing of any.
fn find(known: &[Known], authorization: Option<&[u8]>, now: Timestamp) -> Result<Arc<Caller>, Unidentified> {
    let key = authorization.and_then(bearer).ok_or(Unidentified::NoKey)?;
    let hash = keys::hash(key);
    let mut found = u64::MAX;
    for (index, known) in (0..).zip(known) {
        let equal: Choice = known.entry.hash[..].ct_eq(&hash[..]);
        found.conditional_assign(&index, equal);
    }
    let found = usize::try_from(found).ok().and_then(|index| known.get(index)).ok_or(Unidentified::UnknownKey)?;
    match found.entry.expires {
        Some(expires) if expires <= now => Err(Unidentified::Expired(expires)),
        _ => Ok(Arc::clone(&found.caller)),
    }
}

/// The key in a header `Authorization: Bearer KEY`.
fn bearer(authorization: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = authorization.split_at_checked(b"Bearer ".len())?;
    let key = key.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"Bearer ") && !key.is_empty()).then_some(key)
}

/// Somebody without a key, who has no limits.
fn anonymous(peer: Option<IpAddr>) -> Caller {
    let client = client_id("peer", &peer.map_or_else(String::new, |peer| peer.to_string()));
    let usage = Arc::new(Usage::new(Instant::now()));
    Caller { name: "anonymous".into(), client, limits: Limits::default(), max_priority: Priority::Normal, usage }
}

/// The callers of `entries`; one whose name is among the `old` ones goes on with what it has taken.
fn known(entries: Vec<Entry>, old: &[Known]) -> Vec<Known> {
    let make = |entry: Entry| {
        let before = old.iter().find(|known| known.entry.name == entry.name);
        let caller = Caller {
            name: entry.name.clone(),
            client: client_id("name", &entry.name),
            limits: entry.limits,
            max_priority: entry.max_priority,
            usage: before.map_or_else(|| Arc::new(Usage::new(Instant::now())), |known| Arc::clone(&known.caller.usage)),
        };
        Known { entry, caller: Arc::new(caller) }
    };
    entries.into_iter().map(make).collect()
}

/// The same for the same name in every process.
fn client_id(kind: &str, name: &str) -> ClientId {
    let digest = Sha256::digest(format!("{kind}:{name}"));
    let (first, _) = digest.split_at(size_of::<u64>());
    ClientId(first.iter().fold(0, |id, byte| id << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::keys::NewKey;
    use super::*;

    fn file(names: &[&str], more: &str) -> (Vec<String>, String) {
        let keys: Vec<NewKey> = names.iter().map(|_| NewKey::generate().unwrap()).collect();
        let entry =
            |(name, key): (&&str, &NewKey)| format!("[[key]]\nname = \"{name}\"\nhash = \"{}\"\n{more}\n", key.hash);
        let text = names.iter().zip(&keys).map(entry).collect();
        (keys.into_iter().map(|key| key.secret).collect(), text)
    }

    #[test]
    fn a_key_is_known_by_its_header_alone() {
        let (secrets, text) = file(&["ada", "bob"], "");
        let known = known(keys::parse(&text).unwrap(), &[]);
        let ask =
            |header: &str| find(&known, Some(header.as_bytes()), Timestamp::now()).map(|caller| caller.name.clone());
        for (secret, name) in secrets.iter().zip(["ada", "bob"]) {
            for scheme in ["Bearer ", "bearer ", "Bearer  "] {
                assert_eq!(ask(&format!("{scheme}{secret}")).as_deref(), Ok(name));
            }
        }
        let first = &secrets[0];
        for wrong in [format!("Bearer {first}0"), format!("Bearer {}", &first[..70]), "Bearer x".into()] {
            assert_eq!(ask(&wrong), Err(Unidentified::UnknownKey), "{wrong}");
        }
        for absent in [first.clone(), format!("Basic {first}"), "Bearer ".into(), "Bearer".into(), String::new()] {
            assert_eq!(ask(&absent), Err(Unidentified::NoKey), "{absent}");
        }
        assert_eq!(find(&known, None, Timestamp::now()).unwrap_err(), Unidentified::NoKey);
    }

    #[test]
    fn a_key_is_good_until_it_expires() {
        let (secrets, text) = file(&["ada"], "expires = \"2030-01-01T00:00:00Z\"");
        let known = known(keys::parse(&text).unwrap(), &[]);
        let header = format!("Bearer {}", secrets[0]);
        let at = |time: &str| find(&known, Some(header.as_bytes()), time.parse().unwrap()).map(|_| ());
        assert_eq!(at("2029-12-31T23:59:59Z"), Ok(()));
        assert!(matches!(at("2030-01-01T00:00:00Z"), Err(Unidentified::Expired(_))));
    }

    #[test]
    fn new_limits_do_not_forgive_what_was_taken() {
        let (_, text) = file(&["ada"], "requests_per_minute = 1");
        let first = known(keys::parse(&text).unwrap(), &[]);
        let now = Instant::now();
        assert!(first[0].caller.admit(now).is_ok());
        let second = known(keys::parse(&text).unwrap(), &first);
        assert!(second[0].caller.admit(now).is_err());
        assert_eq!(second[0].caller.client, first[0].caller.client);
    }

    #[test]
    fn without_keys_addresses_tell_callers_apart() {
        let (open, _) = Callers::open(None).unwrap();
        let client = |peer: [u8; 4]| open.identify(None, Some(peer.into())).unwrap().client;
        assert_eq!(client([10, 0, 0, 1]), client([10, 0, 0, 1]));
        assert_ne!(client([10, 0, 0, 1]), client([10, 0, 0, 2]));
    }
}

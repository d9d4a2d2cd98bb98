//! The kit's faults do what they say, and nothing else.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sirocco_testkit::faults::clock::Clock;
use sirocco_testkit::faults::disk::{Damage, damaged};
use sirocco_testkit::faults::network::{Conditions, Link, Network, State};
use sirocco_testkit::process::Process;
use sirocco_testkit::{PATIENCE, wait_for};

/// A server that sends back what it is sent.
fn echo() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut back = stream.try_clone().unwrap();
                // A reset is one way for a connection to end.
                let _ = std::io::copy(&mut stream, &mut back);
            });
        }
    });
    address
}

/// A network, a link of it that leads to an echo, and a connection through it.
fn linked() -> (Network, Arc<Link>, TcpStream) {
    let network = Network::new(7).unwrap();
    let link = network.link("echo");
    let way = link.way("grpc").unwrap();
    link.lead("grpc", echo()).unwrap();
    let stream = TcpStream::connect(way).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (network, link, stream)
}

/// Sends `bytes` and waits until as many are back; returns them and how long that took.
fn round_trip(stream: &mut TcpStream, bytes: &[u8]) -> (Vec<u8>, Duration) {
    let began = Instant::now();
    let mut writer = stream.try_clone().unwrap();
    let sent = bytes.to_vec();
    let sending = std::thread::spawn(move || writer.write_all(&sent));
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back).unwrap();
    sending.join().unwrap().unwrap();
    (back, began.elapsed())
}

/// Bytes of which no two neighbours are alike.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 31 % 251) as u8).collect()
}

#[test]
fn late_narrow_and_lossy_links_change_no_byte_and_take_their_time() {
    let (_network, link, mut stream) = linked();
    let sent = bytes(300_000);
    assert_eq!(round_trip(&mut stream, &sent).0, sent);
    let ms = Duration::from_millis;
    let late = Conditions { delay: ms(40), jitter: ms(10), ..Conditions::default() };
    let narrow = Conditions { bytes_per_s: Some(1_000_000), ..Conditions::default() };
    let lossy = Conditions { lost_per_mille: 300, ..Conditions::default() };
    for (conditions, least) in [(late, ms(80)), (narrow, ms(300)), (lossy, ms(200))] {
        link.put(State::both(conditions));
        let (back, took) = round_trip(&mut stream, &sent);
        assert_eq!(back, sent);
        assert!(took >= least, "{conditions:?}: {took:?}");
    }
    link.heal();
    assert_eq!(round_trip(&mut stream, &sent).0, sent);
}

#[test]
fn silence_holds_bytes_and_connections_up_and_loses_none() {
    let (_network, link, mut stream) = linked();
    assert_eq!(round_trip(&mut stream, b"before").0, b"before");
    link.put(State::silent());
    let mut new = TcpStream::connect(link.way("grpc").unwrap()).unwrap();
    for (stream, word) in [(&mut stream, b"held"), (&mut new, b"hold")] {
        stream.write_all(word).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let error = stream.read(&mut [0]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    link.heal();
    for (stream, word) in [(&mut stream, b"held"), (&mut new, b"hold")] {
        let mut back = [0; 4];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, word);
    }
}

#[test]
fn a_bit_of_every_so_many_kib_is_flipped_and_no_other() {
    let (_network, link, mut stream) = linked();
    let corrupt = Conditions { corrupt_every_kib: Some(64), ..Conditions::default() };
    link.put(State { forth: corrupt, ..State::default() });
    let sent = bytes(1 << 20);
    let (back, _) = round_trip(&mut stream, &sent);
    let flipped: u32 = sent.iter().zip(&back).map(|(sent, back)| (sent ^ back).count_ones()).sum();
    // A chunk may be as long as the interval.
    assert!((8..=16).contains(&flipped), "{flipped} bits");
}

#[test]
fn a_reset_is_seen_as_one_and_a_refusing_link_takes_nobody() {
    let (_network, link, mut stream) = linked();
    assert_eq!(round_trip(&mut stream, b"before").0, b"before");
    link.reset();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let way = link.way("grpc").unwrap();
    let mut stream = TcpStream::connect(way).unwrap();
    assert_eq!(round_trip(&mut stream, b"again").0, b"again");
    link.put(State::refusing());
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let mut refused = TcpStream::connect(way).unwrap();
    assert!(refused.read(&mut [0]).is_err());
    link.heal();
    let mut stream = TcpStream::connect(way).unwrap();
    assert_eq!(round_trip(&mut stream, b"again").0, b"again");
}

#[test]
fn a_way_leads_elsewhere_for_new_connections_and_nowhere_once_the_network_is_gone() {
    let (network, link, mut stream) = linked();
    assert_eq!(round_trip(&mut stream, b"first").0, b"first");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    link.lead("grpc", listener.local_addr().unwrap()).unwrap();
    let way = link.way("grpc").unwrap();
    let mut other = TcpStream::connect(way).unwrap();
    other.write_all(b"x").unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    accepted.read_exact(&mut [0]).unwrap();
    assert_eq!(round_trip(&mut stream, b"still").0, b"still");
    drop((network, link));
    wait_for("the links to be closed", || Ok(TcpStream::connect(way).is_err().then_some(()))).unwrap();
}

#[test]
fn a_clock_jumps_in_a_process_that_runs_and_in_no_other() {
    let clock = Clock::new().unwrap();
    let envs = clock.envs().unwrap();
    let envs: Vec<(&str, &str)> = envs.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let ticks = ["-c", r"while :; do printf '%(%s)T\n' -1; sleep 0.1; done"];
    let process = Process::start_at(Path::new("bash"), &ticks, &envs).unwrap();
    for jump in [0, -86_400] {
        clock.jump(jump).unwrap();
        wait_for(&format!("a clock of {jump:+} s"), || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs().cast_signed();
            let said = process.stdout().lines().last().map_or(Ok(0), str::parse::<i64>)?;
            Ok((said - now - jump).abs().lt(&60).then_some(()))
        })
        .unwrap();
    }
}

#[test]
fn a_process_that_gets_no_more_memory_ends() {
    let grow = ["-c", "printf -v mib '%1048576s' ''; echo started; while :; do all=$all$mib; done"];
    let mut process = Process::start_at(Path::new("bash"), &grow, &[]).unwrap();
    process.wait_for_line("started").unwrap();
    process.limit_memory(1 << 20).unwrap();
    assert!(!process.wait().unwrap().success());
}

#[test]
fn a_damaged_file_is_damaged_where_it_is_said_and_the_others_are_whole() {
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original");
    std::fs::create_dir(&original).unwrap();
    for name in ["a", "b"] {
        std::fs::write(original.join(name), [0_u8; 10]).unwrap();
    }
    for (name, damage, expected) in [
        ("cut", Damage::Truncated(60), vec![0; 6]),
        ("flipped", Damage::Flipped(17), vec![0, 0, 2, 0, 0, 0, 0, 0, 0, 0]),
    ] {
        let copy = folder.path().join(name);
        damaged(&original, &copy, "a", damage).unwrap();
        assert_eq!(std::fs::read(copy.join("a")).unwrap(), expected);
        assert_eq!(std::fs::read(copy.join("b")).unwrap(), [0; 10]);
    }
    assert!(damaged(&original, &folder.path().join("none"), "a", Damage::Flipped(80)).is_err());
}
